"""What nobody needs any more: policies, what must stay, and the deletion in each store."""
