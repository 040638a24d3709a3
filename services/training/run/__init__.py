"""The processes that train, and the commands, deaths and full disks that they handle."""
