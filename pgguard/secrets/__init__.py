"""What a secret looks like, wherever it stands: in SQL, comments, command lines, URLs, settings, headers and logs."""
