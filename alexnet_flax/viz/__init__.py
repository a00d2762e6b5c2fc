"""Reports, figures and the web demo."""
