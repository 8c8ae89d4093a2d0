"""`dpo doctor`: what this machine has, and whether it computes as it should."""
