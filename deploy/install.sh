#!/bin/sh
# Install federad on a Debian or Ubuntu machine with Python 3.11 or newer: program, accounts, services.
#
#   sudo sh deploy/install.sh site [--data DIR] [--folder DIR] [--anchor DIR]     for a hospital
#   sudo sh deploy/install.sh server [--folder DIR]                               for the operator
#
# Run again, it brings the program up to date and leaves folders and settings as they are. DESTDIR=DIR in the environment only
# writes the files of /etc and /usr/local/bin, under DIR.
set -eu

usage() { sed -n '4,5s/^# *//p' "$0" >&2; exit 2; }

here=$(cd "$(dirname "$0")" && pwd)
role=${1:-}
[ $# -gt 0 ] && shift
data=/srv/images
anchor=''
case $role in
site) folder=/var/lib/federad/site units='federad-station federad-courier' ;;
server) folder=/var/lib/federad/consortium units=federad-server ;;
*) usage ;;
esac
while [ $# -gt 0 ]; do
    [ $# -gt 1 ] || usage
    case $1 in
    --data) data=$2 ;;
    --folder) folder=$2 ;;
    --anchor) anchor=$2 ;; # where site.toml will name the ledger's anchor, best on another disk
    *) usage ;;
    esac
    shift 2
done
for path in "$data" "$folder" ${anchor:+"$anchor"}; do
    case $path in
    *[!A-Za-z0-9._/-]* | [!/]*) echo "$path: give an absolute path of letters, digits, dots, hyphens and underscores" >&2; exit 2 ;;
    esac
done

program=/opt/federad
root=${DESTDIR:-}

alone() { # whoever works at the operator's machine can reach Flower's Control API there
    case $role in site) other=server ;; server) other=site ;; esac
    if [ -e "/usr/local/bin/federad-$other" ]; then
        echo "This machine is a $other already, and a $role needs one of its own: docs/operator.md says why" >&2
        exit 1
    fi
}

packages() { # Debian's, where they are missing
    needed='' nginx=''
    python3 -c 'import ensurepip' 2>/dev/null || needed='python3 python3-venv'
    case $role in
    site) command -v setfacl >/dev/null || needed="$needed acl" ;; # with which the images are opened to the station
    server) [ -x /usr/sbin/nginx ] || nginx='nginx-light' ;;
    esac
    if [ -n "$needed$nginx" ]; then
        apt-get update
        # shellcheck disable=SC2086  # a list of words
        apt-get install --yes --no-install-recommends $needed $nginx
        [ -z "$nginx" ] || systemctl disable --now nginx # federad starts its own
    fi
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed' >&2; exit 1; }
}

accounts() {
    getent group federad >/dev/null || groupadd --system federad
    case $role in
    site) names='federad-data federad-net' ;;
    server) names=federad ;;
    esac
    for name in $names; do
        getent passwd "$name" >/dev/null ||
            useradd --system --gid federad --home-dir "$program" --no-create-home --shell /usr/sbin/nologin "$name"
    done
}

program() { # without an NVIDIA GPU, PyTorch's build without CUDA: it is a tenth of the size
    rm -rf "$program.old"
    [ ! -e "$program" ] || mv "$program" "$program.old"
    trap 'rm -rf "$program"; [ ! -e "$program.old" ] || mv "$program.old" "$program"' EXIT # if the network fails, as before
    python3 -m venv "$program"
    if [ "$role" = site ] && [ -e /dev/nvidiactl ]; then index=''; else index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}; fi
    "$program/bin/pip" install -c "$here/../constraints.txt" --no-deps ${index:+--index-url "$index"} torch
    "$program/bin/pip" install -c "$here/../constraints.txt" "$here/..[$role]"
    trap - EXIT
    rm -rf "$program.old"
}

folders() {
    parent=$(dirname "$folder")
    install -d -m 755 "$parent"
    case $role in
    site) [ -z "$anchor" ] || install -d -m 700 -o federad-data -g federad "$anchor" ;;
    server) install -d -m 700 -o federad -g federad "$folder" ;;
    esac
}

settings() { # services, and the command for the administrator
    install -d "$root/etc/systemd/system" "$root/usr/local/bin"
    for unit in $units; do
        sed -e "s#/var/lib/federad/site#$folder#g" -e "s#/var/lib/federad/consortium#$folder#g" -e "s#/srv/images#$data#g" \
            ${anchor:+-e "/^ReadWritePaths=.*station/s#\$# $anchor#"} \
            "$here/systemd/$unit.service" >"$root/etc/systemd/system/$unit.service"
    done
    if [ "$role" = site ] && [ ! -e "$root/etc/federad/site.env" ]; then # for the courier and the command
        install -d "$root/etc/federad"
        echo '#HTTPS_PROXY=http://proxy.hospital.example:3128' >"$root/etc/federad/site.env"
        chmod 600 "$root/etc/federad/site.env" # a login may stand in it
    fi
    command=$root/usr/local/bin/federad-$role
    {
        printf '#!/bin/sh\nexport FEDERAD_TYPED="sudo federad-%s" FEDERAD_START="sudo systemctl enable --now %s"\n' "$role" "$units"
        case $role in
        site)
            printf 'if [ -r /etc/federad/site.env ]; then set -a; . /etc/federad/site.env; set +a; fi\n'
            printf 'FEDERAD_SITE=%s exec %s/bin/federad-site "$@"\n' "$folder" "$program" ;;
        server) # as the account that the folder belongs to
            printf 'exec setpriv --reuid=federad --regid=federad --init-groups \\\n'
            printf '    env HOME=%s FEDERAD_SERVER=%s %s/bin/federad-server "$@"\n' "$folder" "$folder" "$program" ;;
        esac
    } >"$command"
    chmod 755 "$command"
}

if [ -z "$root" ]; then
    [ "$(id -u)" = 0 ] || { echo 'Run it as root: sudo sh deploy/install.sh ...' >&2; exit 1; }
    alone
    packages
    accounts
    program
    folders
fi
settings
if [ -z "$root" ]; then systemctl daemon-reload; fi
case $role in
site) echo "Installed. Next:  sudo federad-site enrol INVITATION --data $data" ;;
server) echo "Installed. Next:  sudo federad-server init $folder --host NAME:8443" ;;
esac
