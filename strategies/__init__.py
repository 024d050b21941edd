"""The strategies that ship: one file for each, registered by entry points as a plugin's are."""
