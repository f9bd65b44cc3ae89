"""Memory, time and placement of queries, estimated before anything starts."""
