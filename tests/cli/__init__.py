"""What users type, and what they are told when it can't be done."""
