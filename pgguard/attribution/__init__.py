"""Who is at the other end of a connection: processes, each with the evidence for it. Knows no protocol."""
