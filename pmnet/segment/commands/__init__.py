"""The commands of `pmnet`, one file each."""
