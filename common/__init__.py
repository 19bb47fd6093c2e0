"""What gateway, launcher and lab all need, written once. It knows none of them."""
