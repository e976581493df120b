"""What a watch and an audit have found, for people and for programs."""
