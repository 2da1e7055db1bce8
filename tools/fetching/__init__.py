"""What download.py is made of: the hub's files, shards and their notes, and the embedded corpus."""
