"""TinyWorld: a real task for real, tiny models, built on the spot in three minutes on two cores. See README.md."""
