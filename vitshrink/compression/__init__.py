"""From statistics to a smaller model: candidates, one allocation, repairs."""
