"""Problems that a generator makes and a program can check: (seed, number) -> problem."""
