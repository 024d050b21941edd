"""The strategies that ship: one file each, found through entry points like an outsider's."""
