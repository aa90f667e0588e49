"""Its tests."""

from __future__ import annotations

from django.contrib.auth.models import User
from django.test import TestCase


class UsersTest(TestCase):
    def test_a_user_is_kept(self) -> None:
        User.objects.create(username="one")
        assert User.objects.count() == 1
