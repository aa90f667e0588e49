"""What startproject makes, and what shows that this is Django's."""

import sys

import site_settings  # noqa: F401 - configures Django
from django.core.management import execute_from_command_line

execute_from_command_line(sys.argv)
