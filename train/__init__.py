"""The three stages and the draft head: one command and one `Trainer` each."""
