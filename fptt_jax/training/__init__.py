"""The train step, evaluation, and many steps or members in one program."""
