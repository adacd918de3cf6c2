package reconcile

// explanation says what an error of Entra's means and what to do.
type explanation struct{ text, fix string }

// pendingDeviceCode is no failure: the user has not entered the code yet.
const pendingDeviceCode = 70016

// explainCode returns what the AADSTS code of a failed sign-in means, and false for one
// that is not among those that clients of Partner Center are known to meet. See
// learn.microsoft.com/entra/identity-platform/reference-error-codes.
func explainCode(code int) (explanation, bool) {
	const (
		withMFA    = "Sign in interactively with MFA and store the new refresh token."
		newConsent = "Redo the consent with MFA and store the new refresh token; run a refresh at least once a month."
		credential = "Repair the client's credential in the app registration and in the client's settings."
		register   = "Repair the app registration and its consent in the partner tenant."
		adapt      = "Adapt the Conditional Access policy to how this account signs in, not by excluding it from MFA."
		account    = "Repair the account."
	)
	switch code {
	case 50058:
		return explanation{"There was no signed-in session for a silent request.", "Sign in interactively."}, true
	case 50072, 50079:
		return explanation{"The user must register for MFA, or the federated provider must assert it.", "Register MFA, then redo the consent. For a federated user let the provider emit the MFA claim."}, true
	case 50074:
		return explanation{"MFA was asked for and not passed.", withMFA}, true
	case 50076:
		return explanation{"MFA is needed, because a policy or the location changed; the usual answer to a password grant or a refresh token without MFA.", withMFA}, true
	case 50078:
		return explanation{"The MFA of the session is too old for the policy.", withMFA}, true
	case 50126:
		return explanation{"The user name or password is wrong.", account}, true
	case 50053:
		return explanation{"The account is locked, or the address is blocked.", account}, true
	case 50055:
		return explanation{"The password has expired.", account}, true
	case 50057:
		return explanation{"The account is disabled.", account}, true
	case 50105:
		return explanation{"The user is not assigned to the application.", "Assign the user to the enterprise application."}, true
	case 50131, 53000, 53001, 53002, 53003, 530002, 530003:
		return explanation{"A Conditional Access policy blocked the sign-in by device, app or other conditions.", adapt}, true
	case 530035:
		return explanation{"Security defaults blocked the sign-in.", "Register MFA and stop legacy authentication."}, true
	case 53004:
		return explanation{"The user must register for MFA first.", "Register MFA and stop legacy authentication."}, true
	case 50158:
		return explanation{"An external challenge, such as a third-party MFA attached as a custom control, was not passed.", "Move the provider to an external authentication method (EAM) or to federation."}, true
	case 50161:
		return explanation{"The claims of the external provider are invalid.", "Check the identity provider."}, true
	case 50173:
		return explanation{"The grant was revoked, as after a password reset.", newConsent}, true
	case 50177:
		return explanation{"An external challenge is not possible for a user of another tenant.", "Sign in with an account of this tenant."}, true
	case 50020, 50034:
		return explanation{"The user is not in this tenant.", "Check the tenant in the client's login address, or invite the user as a guest."}, true
	case 50194:
		return explanation{"The application is not multi-tenant, but /common was used.", register}, true
	case 700016:
		return explanation{"The application is not found in the tenant.", register}, true
	case 650052, 500011:
		return explanation{"The tenant has no service principal of the API.", register}, true
	case 650057:
		return explanation{"The API is not among the permissions that the application asks for.", register}, true
	case 65001, 65004, 650056:
		return explanation{"Consent is missing, was declined, or the permissions are misconfigured.", "Give admin consent for user_impersonation."}, true
	case 65002:
		return explanation{"The Microsoft client is not authorised in advance for this API.", "Register an application of your own."}, true
	case 70000, 70008:
		return explanation{"The refresh token or grant is invalid or has expired.", newConsent}, true
	case 700082:
		return explanation{"The refresh token was not used for 90 days.", newConsent}, true
	case 700084:
		return explanation{"The refresh token of a single-page app reached its limit of 24 hours.", newConsent}, true
	case 70043:
		return explanation{"A sign-in frequency policy ended the refresh token.", "Sign in again, or exclude this account from the sign-in frequency."}, true
	case 54005:
		return explanation{"The authorization code was used before.", "Let the client redeem each code once."}, true
	case 7000215:
		return explanation{"The client secret is wrong.", credential}, true
	case 7000222:
		return explanation{"The client secret has expired.", credential}, true
	case 700027:
		return explanation{"The client's signed assertion is not valid.", credential}, true
	case 7000218:
		return explanation{"The client sent no secret or assertion.", credential}, true
	case 700025:
		return explanation{"A public client sent a secret.", credential}, true
	case 50196:
		return explanation{"The client asks in a loop.", "Let the client cache its tokens."}, true
	}
	return explanation{}, false
}
