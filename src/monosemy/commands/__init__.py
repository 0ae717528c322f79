"""The commands of `monosemy`, a file each, which is imported when its command is given."""
