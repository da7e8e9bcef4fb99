"""What the ops share: document layout, output types, input checks, choice of backend."""
