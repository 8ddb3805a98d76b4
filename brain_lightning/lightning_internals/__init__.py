"""Every private part of Lightning that is used."""
