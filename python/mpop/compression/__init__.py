"""From a dense model to a compressed one: what each matrix becomes, and the report."""
