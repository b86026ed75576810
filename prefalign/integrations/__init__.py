"""Other libraries' trainers with the fused ops inside. A module each; none imports its library."""
