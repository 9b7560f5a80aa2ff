"""The lowest versions that pyproject.toml names, as pip's requirements."""

import re
import tomllib
from pathlib import Path


project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
named = [*project["dependencies"], *extras["test"], *extras["examples"]]
pins = (re.match(r"([\w-]+)>=([\d.]+)", requirement) for requirement in named)
print(*(f"{pin[1]}=={pin[2]}" for pin in pins if pin), sep="\n")
