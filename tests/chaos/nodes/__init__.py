"""Ray clusters of several nodes on one machine, and checks that kill one of the nodes."""
