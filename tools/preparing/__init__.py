"""What prepare.py is made of: shards and texts read, parsed, encoded, and put together as token files."""
