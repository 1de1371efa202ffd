"""What the commands share: the parser, options that several have, types of values."""
