"""What a run says of itself, as plain objects that are handed down; nothing here measures a clock."""
