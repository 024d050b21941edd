"""`python -m upcycle_bench`, which is what torchrun starts on every rank."""

from upcycle_bench.cli import main

if __name__ == "__main__":
    main()
