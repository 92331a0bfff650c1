"""Other people's trainers; each module needs its trainer, and nothing else in sam_core imports it."""
