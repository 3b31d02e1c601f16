"""What drafting gains on this machine: what passes cost, how often drafts are right, and what comes of the two."""
