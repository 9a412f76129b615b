"""What never ships: the local cloud, the server that starts everything, and the commands of the operator."""
