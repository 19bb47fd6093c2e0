"""The one layer between the gateway and its databases."""
