"""What files and records say of where pictures come from, in the forms of others."""
