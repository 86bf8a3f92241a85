class ExportError(Exception):
    """For a person to read: names the file, the option, or the node."""
