"""What a user may say: the config and its command line."""
