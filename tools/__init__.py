"""Programs around training: download, prepare, plan, inspect."""
