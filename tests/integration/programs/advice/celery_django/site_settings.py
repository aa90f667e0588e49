"""A project in one file."""

import os
from urllib.parse import parse_qs, urlsplit

import django
from django.conf import settings

address = urlsplit(os.environ["DATABASE_URL"])
where = {name: values[0] for name, values in parse_qs(address.query).items()}
settings.configure(
    SECRET_KEY="none",
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF="app",
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": address.path[1:],
            "USER": address.username,
            "HOST": where["host"],
            "PORT": where["port"],
            "CONN_MAX_AGE": None,
        }
    },
)
django.setup()
