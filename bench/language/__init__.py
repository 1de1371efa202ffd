"""What cutting a real decoder costs it on text, beside what published tools do."""
