"""Asks something as soon as it is imported, before the workers are forked, as many an AppConfig.ready() does."""

import site_settings  # noqa: F401 - configures Django
from django.core.wsgi import get_wsgi_application
from django.db import connection
from django.http import HttpResponse
from django.urls import path


def ask(number):
    with connection.cursor() as cursor:
        cursor.execute("SELECT %s", [number])
        [answer] = cursor.fetchone()
    return answer


def view(request):
    return HttpResponse(str(ask(int(request.META["QUERY_STRING"]))))


urlpatterns = [path("", view)]
application = get_wsgi_application()
ask(1)
