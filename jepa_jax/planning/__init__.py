"""What a step costs on hardware that is not there, as compilers say."""
