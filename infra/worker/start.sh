#!/bin/sh
# Clones the repository into the volume /checkout once, and takes on runs of the work pool from there.
set -eu
if [ ! -d /checkout/numprune/.git ]; then
    git clone "$NUMPRUNE_REPOSITORY" /checkout/numprune
fi
cd /checkout/numprune
git config user.name "${GIT_AUTHOR_NAME:-numprune}"
git config user.email "${GIT_AUTHOR_EMAIL:-numprune@localhost}"
exec prefect worker start --pool numprune --type process --name "${HOSTNAME:-worker}"
