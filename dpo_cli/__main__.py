"""`python -m dpo_cli` is `dpo`, so that `accelerate launch -m dpo_cli` and `torchrun -m dpo_cli` work."""

from dpo_cli.cli import main

if __name__ == "__main__":
    main()
