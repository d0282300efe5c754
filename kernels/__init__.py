"""One sub-package per operation; callers use its one public function and never branch on hardware."""
