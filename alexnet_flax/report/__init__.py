"""`report.html`: a run, or several side by side, as one page that needs nothing else."""
