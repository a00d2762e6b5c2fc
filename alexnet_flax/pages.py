"""The templates of pages: what they are given is text, whatever it looks like."""

import jinja2


def page_template(name: str) -> jinja2.Template:
  """One of the package's templates; a value that it is not given is an error."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('alexnet_flax'), autoescape=True, undefined=jinja2.StrictUndefined
  )
  return environment.get_template(name)
