"""Rank actors, placement, rendezvous and the supervisor's shell: what makes a world of ranks on Ray."""
