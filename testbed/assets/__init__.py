"""What guests are made of: Debian's packages, the images, our driver."""
