"""The formats of preference data: which format a row has, and the readers that make groups of rows."""
