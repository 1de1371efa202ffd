"""What other software needs to use MPO models: peft, and programs for other runtimes."""
