"""What makes a killed run go on bit for bit."""
